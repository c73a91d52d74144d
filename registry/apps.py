from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.db.models.signals import post_migrate, post_save, pre_delete


class RegistryConfig(AppConfig):
    name = "registry"
    verbose_name = "Registry"

    def ready(self) -> None:
        from registry.ledger_guard import guard_after_migrate

        post_migrate.connect(guard_after_migrate, sender=self, dispatch_uid="ledger_guard")
        # People are Django's: whichever page or command disables or deletes one, their keys must hear of it.
        post_save.connect(_person_saved, sender=settings.AUTH_USER_MODEL, dispatch_uid="registry.person")
        pre_delete.connect(_person_deleted, sender=settings.AUTH_USER_MODEL, dispatch_uid="registry.person")


def _person_saved(*, instance: Any, created: bool, update_fields: Any, raw: bool, **_: Any) -> None:
    # Each log-in saves `last_login` alone.
    if not created and not raw and (update_fields is None or "is_active" in update_fields):
        from registry.actions.projects import note_person_changed

        note_person_changed(user_id=instance.pk)


def _person_deleted(*, instance: Any, **_: Any) -> None:
    from registry.actions.projects import end_keys_of

    end_keys_of(user=instance, by="system")
