"""The blind pairwise study: design, videos, log of answers, analysis; the web page is app/study.py."""
