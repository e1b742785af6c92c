"""What is measured: judges turn answers into verdicts, metrics sum them up. Knows torch and text only."""
