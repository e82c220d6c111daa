"""Protocols: one file per kind of experiment. Each turns cells into finished run folders."""
