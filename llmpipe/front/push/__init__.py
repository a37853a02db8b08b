"""`llmpipe push`: a finished artifact to the Hub, with a card made of its manifests.

    push.py       the story from top to bottom
    named.py      what the command line names: an artifact, a repository
    ancestry.py   what it was made from: manifests, up to models from elsewhere
    rows.py       the rows that went in
    measured.py   the evaluations of its run that scored it
    licences.py   under which licence base, rows and model are: recorded, or asked for;
                  licence_ids.py has those that the Hub knows
    adapter.py    an adapter's base, where others find it
    template.py   how the chat template writes a question
    card.py       the card: records in, Markdown out; card.md.jinja is its text, use-*.md.jinja how
                  to use what there is, and markdown.py shows texts that may hold anything
    contents.py   the files of the repository, each with its sum; a dry run writes them
    hub.py        the repository: what is there, what is sent, one commit at the end
    refusals.py   what the Hub answers where it refuses, in a line with a remedy

Nothing leaves this machine before every file of the artifact was held against its manifest.
"""
