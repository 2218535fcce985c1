"""What is trained on the encoders' features, and how its scores are smoothed and voted to a map."""
