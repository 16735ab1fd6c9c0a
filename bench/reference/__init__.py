"""What tests and benchmarks compare with: independent implementations, random weights, and measures of difference."""
