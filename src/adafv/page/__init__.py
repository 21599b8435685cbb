"""The page of `adafv page`: ask about a picture in the browser, see what pruning kept, lost and saved, and check it on
questions of one's own.

    answers.py       picture, question, budgets and methods in, results out; knows nothing of the page
    checks.py        questions and a zip of pictures in, what pruning loses out; nor does it
    render.py        results as HTML
    render_check.py  a check as HTML
    app.py           the page itself, in Gradio
    guard.py         which requests reach Gradio at all
    uploads.py       the folder of uploads, and the only way to read from it
    archive.py       unpacking a zip of pictures
    turns.py         one at a time, in the order of coming
    samples.py       the pictures to choose from

Gradio is an extra (`adafv[page]`); only `app.py` imports it, and `guard.py` the Starlette beneath it.
"""
