"""Settings: `base` holds everything, the three small files beside it what differs."""
