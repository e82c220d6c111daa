"""Tables, figures, page and README lines made from results/. No torch."""
