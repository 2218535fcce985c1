"""The limits that scores are held against, and the verdict; raw scores are kept, only the limits move."""

import math
from dataclasses import dataclass
from typing import Literal

from m3ad.errors import FrameError

Verdict = Literal["good", "review", "defect"]
VERDICTS: tuple[Verdict, ...] = ("good", "review", "defect")  # in this order as numbers: 0, 1, 2


@dataclass(frozen=True, slots=True)
class Limits:
    """What a score is held against: above `reject` a part is defective, above `review` somebody looks at it.

    Raises:
        ValueError: a limit is not finite, or `review` lies above `reject`.
    """

    reject: float
    review: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.reject) or not (self.review is None or math.isfinite(self.review)):
            raise ValueError(f"limits must be finite, got reject {self.reject} and review {self.review}")
        if self.review is not None and self.review > self.reject:
            raise ValueError(
                f"the limit of review, {self.review:g}, lies above that of reject, {self.reject:g}; "
                "a part is looked at before it is rejected, so it must be the lower one"
            )

    @property
    def lowest(self) -> float:
        """What a good part's score does not exceed."""
        return self.reject if self.review is None else self.review

    def moved(self, reject: float | None = None, review: float | None = None) -> "Limits":
        """The limits with one or both replaced; a review above a reject that was moved alone goes with it.

        Raises:
            ValueError: as above.
        """
        if reject is None:
            reject = self.reject
        if review is None and self.review is not None:
            review = min(self.review, reject)
        return Limits(reject, review)


def verdict(score: float, limits: Limits) -> Verdict:
    """`defect` above the reject limit, `review` above the review limit, else `good`.

    Raises:
        FrameError: the score is not a number, so that there is no verdict.
    """
    if not math.isfinite(score):
        raise FrameError(
            f"there is no verdict: the score is {score}, expected a finite number; "
            "check the networks with m3ad-export parity, or export the bundle again"
        )
    if score > limits.reject:
        return "defect"
    return "good" if score <= limits.lowest else "review"
