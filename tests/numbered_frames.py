"""Frames that say their number, and an inspector that says it again as the score."""

import threading

import numpy as np
from m3ad.frames import Frame
from m3ad_runtime.pipeline import Inspection

LONG_S = 60.0  # only a test that fails waits so long


def small_frame(number: int) -> Frame:
    """A frame that says its number, in each pixel."""
    return Frame(np.full((2, 2, 3), number, np.uint8), np.ones((2, 2, 3), np.float32), f"frame {number}")


def scored(frame: Frame) -> Inspection:
    """An inspection whose score is the frame's number, and 1."""
    score = 1.0 + float(frame.rgb[0, 0, 0])
    return Inspection(score, False, "good", np.zeros((224, 224), np.float32))


class SlowInspector:
    """A double of an inspector that has a frame in work until it is let go on; keeps what it was given, in order."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.given: list[str] = []

    def inspect(self, frame: Frame) -> Inspection:
        self.given.append(frame.name)
        self.begun.set()
        assert self.go_on.wait(LONG_S)
        return scored(frame)
