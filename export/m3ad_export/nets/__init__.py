"""Networks of the detectors that came after Mentor3AD, and what they make of their scores."""
