"""What people said and were answered. Always asked for through `for_user`: what is another person's is
not there."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.utils import timezone

if TYPE_CHECKING:
    from django.contrib.auth.models import AbstractBaseUser

TITLE_LENGTH = 200


class Role(models.TextChoices):
    USER = "user"
    ASSISTANT = "assistant"


class MessageState(models.TextChoices):
    COMPLETE = "complete"
    GENERATING = "generating"
    """Its gateway writes it, and says so every two seconds."""
    STOPPED = "stopped"
    """The person stopped it; what came until then stands."""
    FAILED = "failed"
    """There is no answer; `error` says why."""
    INTERRUPTED = "interrupted"
    """The worker or the gateway ended in mid-answer; what came until then stands."""


class ConversationQuerySet(models.QuerySet["Conversation"]):
    def for_user(self, user: AbstractBaseUser | int) -> ConversationQuerySet:
        """Those that this person may see."""
        return self.filter(user_id=user if isinstance(user, int) else user.pk)


class MessageQuerySet(models.QuerySet["Message"]):
    def for_user(self, user: AbstractBaseUser | int) -> MessageQuerySet:
        """Those that this person may see."""
        return self.filter(conversation__user_id=user if isinstance(user, int) else user.pk)

    def generating(self) -> MessageQuerySet:
        """Those being written. Uses index message_generating_idx."""
        return self.filter(state=MessageState.GENERATING)


class Conversation(models.Model):
    """A tree of messages with one branch in view."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="conversations")
    title = models.CharField(
        max_length=TITLE_LENGTH, blank=True, help_text="Empty until the first message gives one."
    )
    model = models.CharField(max_length=120, blank=True, help_text="Name of the route that answers next.")
    settings = models.JSONField(default=dict, blank=True)
    leaf = models.ForeignKey(
        "webchat.Message",
        on_delete=models.SET_NULL,
        null=True,
        related_name="+",
        help_text="Last message of the branch in view.",
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    updated_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = ConversationQuerySet.as_manager()

    class Meta:
        ordering = ["-updated_at"]
        indexes = [
            # The list beside the chat: one person's, newest first.
            models.Index(fields=["user", "-updated_at"], name="conversation_by_user_idx"),
        ]

    def __str__(self) -> str:
        return self.title or str(self.pk)


class Message(models.Model):
    """One message. Its id is random and still never enough to see it: the owner is checked each time."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    conversation = models.ForeignKey(Conversation, on_delete=models.CASCADE, related_name="messages")
    parent = models.ForeignKey("self", on_delete=models.CASCADE, null=True, related_name="children")
    position = models.PositiveIntegerField(help_text="Order among the messages with the same parent.")
    role = models.CharField(max_length=16, choices=Role)
    content = models.TextField(blank=True)
    state = models.CharField(max_length=16, choices=MessageState, default=MessageState.COMPLETE)
    error = models.CharField(max_length=1000, blank=True)
    model = models.CharField(max_length=120, blank=True)
    request_id = models.CharField(max_length=64, blank=True, help_text="As in the ledger.")
    prompt_tokens = models.PositiveIntegerField(null=True)
    completion_tokens = models.PositiveIntegerField(null=True)
    ttft_ms = models.PositiveIntegerField(null=True)
    duration_ms = models.PositiveIntegerField(null=True)
    stop_requested = models.BooleanField(default=False)
    gateway = models.CharField(
        max_length=80, blank=True, help_text="Name of the gateway that writes it; empty at its end."
    )
    alive_at = models.DateTimeField(null=True, help_text="When its gateway last wrote it.")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = MessageQuerySet.as_manager()

    class Meta:
        ordering = ["created_at", "position"]
        constraints = [
            models.CheckConstraint(condition=Q(role__in=Role.values), name="message_role_is_known"),
            models.CheckConstraint(condition=Q(state__in=MessageState.values), name="message_state_is_known"),
            models.UniqueConstraint(
                fields=["conversation", "parent", "position"], name="one_message_per_position"
            ),
        ]
        indexes = [
            # Asked every half second by each gateway: few among very many.
            models.Index(
                fields=["gateway"], condition=Q(state=MessageState.GENERATING), name="message_generating_idx"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.role} {self.pk}"
