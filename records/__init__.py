"""What a run leaves: rows, answers, and the marker of its end."""
