"""What a task says: settings, cells, run keys, the tables of algorithms, precisions and estimands, and the rules of `suite validate`. No torch."""
