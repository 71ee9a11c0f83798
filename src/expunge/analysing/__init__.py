"""Run folders as analyses see them: what is finished, what is measured beside it, what is kept."""
