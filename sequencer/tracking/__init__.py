"""The log of a run and the loggers that its metrics are sent to."""
