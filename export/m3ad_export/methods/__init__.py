"""Detectors beside Mentor3AD: their networks, score maps, exact rewrites, training and the authors' files."""
