"""Predictions on many files: reading, the network and what is done with the results overlap."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Generic, TypeVar

from trainer.distributed.accelerator import num_cores
from trainer.inference.inputs import UnreadableImage, read_image
from trainer.inference.model import Model, Prepared
from trainer.inference.results import Result

MAX_THREADS = 8  # that read, and as many that write
Outcome = TypeVar("Outcome")
Answer = tuple[Path, Outcome | UnreadableImage]


class Pipeline(Generic[Outcome]):
    """Predicts on files.

    Args:
        models: replicas of one model, on a device each; they share the files.
        finish: called with each file and its result, by several threads.
        threshold: objects of a lower score are left out.
        batch_size: images that a network sees at once, if they have one size.
    """

    def __init__(
        self,
        models: Sequence[Model],
        finish: Callable[[Path, Result], Outcome],
        threshold: float,
        batch_size: int,
    ) -> None:
        self.models, self.finish, self.threshold, self.batch_size = models, finish, threshold, batch_size
        self.threads = min(MAX_THREADS, num_cores())
        self._stopped = threading.Event()
        self._answers: SimpleQueue[Answer[Outcome] | BaseException] = SimpleQueue()
        # Results wait here while all writers are busy; those of huge images take much memory.
        self._slots = threading.Semaphore(self.threads + self.batch_size)

    def run(self, files: Sequence[Path]) -> Iterator[Answer[Outcome]]:
        """What `finish` returns for each file, or what is wrong with it, in the order in which they are done.

        Ends early without waiting for more than the batches in progress, if the caller ends.

        Raises:
            Exception: the network or `finish` failed on a file.
        """
        shares = [files[index :: len(self.models)] for index in range(len(self.models))]
        missing = len(files)
        with (
            ThreadPoolExecutor(self.threads, "reader") as readers,
            ThreadPoolExecutor(self.threads, "writer") as writers,
            ThreadPoolExecutor(len(self.models), "network") as networks,
        ):
            replicas = [
                self._predict(model, share, readers, writers) for model, share in zip(self.models, shares, strict=True)
            ]
            try:
                if len(replicas) == 1:
                    # In this thread: a single network needs no other.
                    for _ in replicas[0]:
                        while not self._answers.empty():
                            missing -= 1
                            yield self._next_answer()
                else:
                    for replica in replicas:
                        networks.submit(self._exhaust, replica)
                for _ in range(missing):
                    yield self._next_answer()
            finally:
                self._stopped.set()
                readers.shutdown(wait=False, cancel_futures=True)

    def _next_answer(self) -> Answer[Outcome]:
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _exhaust(self, replica: Iterator[None]) -> None:
        try:
            deque(replica, maxlen=0)
        except BaseException as error:
            self._answers.put(error)

    def _predict(
        self, model: Model, files: Sequence[Path], readers: ThreadPoolExecutor, writers: ThreadPoolExecutor
    ) -> Iterator[None]:
        """One step for each image that can be read: it is predicted on, and given to a writer."""
        read: deque[Path] = deque()  # in the order of their results
        prepared = self._prepared(model, files, readers, read)
        results = model.predict_prepared(prepared, threshold=self.threshold, batch_size=self.batch_size)
        for result in results:
            self._slots.acquire()
            writers.submit(self._finish, read.popleft(), result)
            yield

    def _prepared(
        self, model: Model, files: Sequence[Path], readers: ThreadPoolExecutor, read: deque[Path]
    ) -> Iterator[Prepared]:
        """The images that can be read, in order, while threads prepare those after them."""
        rest, ahead = iter(files), deque[tuple[Path, Future[Prepared]]]()
        while True:
            for file in islice(rest, self.threads + self.batch_size - len(ahead)):
                ahead.append((file, readers.submit(_prepare, model, file)))
            if not ahead or self._stopped.is_set():
                return
            file, future = ahead.popleft()
            try:
                prepared = future.result()
            except UnreadableImage as error:
                self._answers.put((file, error))
            else:
                read.append(file)
                yield prepared

    def _finish(self, file: Path, result: Result) -> None:
        try:
            if not self._stopped.is_set():
                self._answers.put((file, self.finish(file, result)))
        except BaseException as error:
            self._answers.put(error)
        finally:
            self._slots.release()


def _prepare(model: Model, file: Path) -> Prepared:
    image = read_image(file)
    return image, *model.preparation(image)
