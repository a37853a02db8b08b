"""`llmpipe submit`: a run as a file for SLURM, SkyPilot, Kubeflow or docker.

    job.py      what is asked: a recipe, machines, GPUs; looked at as the job will see it
    render.py   a template and what fills it
    send.py     the file into the run directory, and from there to the system
    *.jinja     the files themselves, one for each system, to be read and changed

Every file starts the ordinary command, so that starting it again goes on with the run.
"""
