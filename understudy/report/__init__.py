"""What HTML reports are made of: charts as SVG, conversations, and a page's style.

    charts.py  line charts, with bands for intervals
    chats.py   conversations taken apart into what was said
    page.py    templates: base.html.jinja (the page and its style), parts.html.jinja (its parts)

A role that writes a report has its own template, which extends the base.
"""
