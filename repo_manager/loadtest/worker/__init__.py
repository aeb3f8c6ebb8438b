"""Load worker processes: schedules, the sending loop, what it records."""
