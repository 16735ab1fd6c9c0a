"""What is to be drawn, and what becomes of it: parameters, prompts files, file names, PNGs, batches."""
