"""Numbers to pictures: one theme, Plotly figures, HTML, slots."""
