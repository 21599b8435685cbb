"""The page of `adafv page`: ask about a picture in the browser, and see what pruning kept, lost and saved.

    answers.py    picture, question, budget and two methods in, results out; knows nothing of the page
    render.py     results as HTML
    app.py        the page itself, in Gradio
    samples.py    the pictures to choose from

Gradio is an extra (`adafv[page]`) and only `app.py` imports it.
"""
