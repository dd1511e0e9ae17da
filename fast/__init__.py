"""What makes the model fast and changes nothing of what it computes."""
