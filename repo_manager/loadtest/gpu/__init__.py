"""GPU utilisation, memory, power and energy."""
