"""Methods × seeds on one target, each tuned with the same small budget."""
