"""What a prompt is, and who already has it: templates, tokens, text. Knows no service, no torch."""
