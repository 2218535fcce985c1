"""Where verdicts go: each sink has its own queue in the ledger, and gets every verdict at least once, in order."""
