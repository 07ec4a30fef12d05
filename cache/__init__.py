"""What a prompt is, and who already has it: tokens, blocks, indexes. Knows no service and no torch."""
