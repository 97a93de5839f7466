"""`python -m jaxtune.plan`."""

from jaxtune import cli, plan

if __name__ == "__main__":
    cli.run(plan.main)
