"""`manage.py scale`: so many replicas."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from config.waiting import add_wait_argument, wait_until_ready
from config.words import operator, sentence_of
from registry.actions.deployments import scale_deployment
from registry.models import Deployment


class Command(BaseCommand):
    help = "Wish for this many replicas of a deployment; at 0 its workers finish what runs and stop."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="The deployment's name.")
        parser.add_argument("replicas", type=int, help="0 to 256.")
        add_wait_argument(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        name, replicas = options["name"], options["replicas"]
        deployment = Deployment.objects.filter(name=name).first()
        if deployment is None:
            known = ", ".join(Deployment.objects.values_list("name", flat=True)[:20]) or "none"
            raise CommandError(f"There is no deployment {name}; known: {known}.")
        before = deployment.replicas
        if replicas < 0:
            raise CommandError("replicas: write 0 or more.")
        try:
            with transaction.atomic():
                scale_deployment(deployment=deployment, replicas=replicas, by=operator())
        except ValidationError as error:
            raise CommandError(sentence_of(error)) from error
        self.stdout.write(f"{name}: {before} → {replicas} replica(s).")
        wait_until_ready(deployment, options["wait"], self.stderr.write, self.stdout.write)
