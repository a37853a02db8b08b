"""`llmpipe push`: a finished artifact, or formats of an export, to the Hub, with a card made of
manifests.

    push.py       the story from top to bottom
    named.py      what the command line names, verified: an artifact, formats of an export; a
                  repository
    ancestry.py   what it was made from: manifests, up to models from elsewhere
    rows.py       the rows that went in
    measured.py   the evaluations of its run that scored it
    licences.py   under which licence base, rows and model are: recorded, or asked for;
                  licence_ids.py has those that the Hub knows
    adapter.py    an adapter's base, where others find it
    formats.py    the formats of an export as the Hub's users expect them; ollama.py what Ollama
                  takes beside a GGUF file
    template.py   how the chat template writes a question
    facts.py      all that a card says, as records
    card.py       the card: records in, Markdown out; metadata.py is what the Hub reads of it,
                  card.md.jinja its text, use-*.md.jinja how to use what there is, and markdown.py
                  shows texts that may hold anything
    contents.py   the files of the repository, each with its sum; a dry run writes them
    hub.py        the repository: what is there, what is sent, one commit at the end
    refusals.py   what the Hub answers where it refuses, in a line with a remedy

Nothing leaves this machine before every file of the artifact was held against its manifest.
"""
