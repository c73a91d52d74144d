"""URLs of the chat that Django serves, and of logging in. The socket is mounted in `config.front`."""

from django.contrib.auth.views import LogoutView
from django.urls import path, re_path
from django.views.generic import RedirectView

from webchat import views
from webchat.login import Login

urlpatterns = [
    path("", RedirectView.as_view(url="/chat/")),
    path("login/", Login.as_view(), name="login"),
    path("logout/", LogoutView.as_view(), name="logout"),
    path("chat", RedirectView.as_view(url="/chat/")),
    path("chat/", views.chat_page, name="chat"),
    path("chat/<uuid:conversation_id>/", views.chat_page, name="chat-conversation"),
    path("chat/api/models", views.models),
    path("chat/api/conversations", views.conversations),
    path("chat/api/conversations/<uuid:conversation_id>", views.conversation),
    re_path(r"^chat/api/(?P<rest>.*)\Z", views.unknown),
]
