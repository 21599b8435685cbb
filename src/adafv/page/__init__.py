"""The page of `adafv page`: ask about a picture in the browser, and see what pruning kept, lost and saved.

    answers.py    picture, question, budget and two methods in, results out; knows nothing of the page
    render.py     results as HTML
    app.py        the page itself, in Gradio
    guard.py      which requests reach Gradio at all
    uploads.py    the folder of uploads, and the only way to read from it
    samples.py    the pictures to choose from

Gradio is an extra (`adafv[page]`); only `app.py` imports it, and `guard.py` the Starlette beneath it.
"""
