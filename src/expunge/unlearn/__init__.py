"""Training: objectives, step rules, schedules, and the loop that runs them."""
