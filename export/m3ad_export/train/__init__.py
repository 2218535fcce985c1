"""Good frames -> a trained detector."""
