"""What NetworkPolicy means, in plain Python."""
