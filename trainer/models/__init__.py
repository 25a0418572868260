"""Models: plain torch code; each module registers its builders."""
