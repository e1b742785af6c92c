"""What runs add up to: studies, other judges' verdicts, and the report."""
