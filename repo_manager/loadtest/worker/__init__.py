"""Load worker processes: schedules, the sending loop, its records."""
