"""The stages on a CPU, above the ops, and the pipeline that runs them in one process."""
