"""Load on a served model: arrival schedules, clients, measurements, gates."""
