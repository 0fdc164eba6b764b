"""What there is to do, and what decides every bit of its result."""
