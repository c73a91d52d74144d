/** The chat page: one conversation in view, its list beside it, one socket for all answers. */

import * as api from "./api.js";
import { Composer, forgetDrafts } from "./composer.js";
import { announce, byId } from "./dom.js";
import { closeMenus } from "./menu.js";
import { MessageView } from "./message.js";
import { ModelPicker } from "./models.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Connection, tooLarge } from "./socket.js";
import { Tree } from "./tree.js";

const CONTENT_CHARACTERS = 200_000;
const ANSWER_TO_SEND_MS = 15_000;
const NEAR_THE_END = 60;

class Chat {
  constructor() {
    this.conversation = null; // null: a new one that the server does not know yet
    this.tree = new Tree();
    this.views = new Map();
    this.pending = null; // what was handed to the socket and not yet taken
    this.loading = 0;
    this.thread = byId("thread");
    this.scroller = byId("scroller");

    this.composer = new Composer({ onSend: (text) => void this.send(text), onStop: () => this.stop() });
    this.settings = new Settings((settings) => this.change({ settings }));
    this.picker = new ModelPicker(
      (model) => void this.change({ model }),
      (error) => this.failed(error, true),
    );
    this.sidebar = new Sidebar({
      onOpen: (id) => void this.open(id),
      onDeleted: (id) => id === this.conversation?.id && this.startNew(),
      onRenamed: (item) => item.id === this.conversation?.id && this.named(item.title),
      onError: (error) => this.failed(error),
    });
    this.connection = new Connection(
      "/chat/ws",
      (frame) => this.receive(frame),
      (open) => this.connected(open),
    );
    this.listen();
    void this.picker.poll();
    void this.sidebar.load();
    void this.route();
  }

  listen() {
    addEventListener("popstate", () => void this.route());
    byId("new-chat").addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      this.startNew();
    });
    byId("dismiss-error").addEventListener("click", () => this.showError(""));
    byId("logout-form").addEventListener("submit", forgetDrafts);
    byId("to-end").addEventListener("click", () => this.scrollToEnd(true));
    this.scroller.addEventListener("scroll", () => this.showToEnd(), { passive: true });
    document.addEventListener("keydown", (event) => this.onKey(event));
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) void this.sidebar.load();
    });
  }

  onKey(event) {
    if (event.key === "Escape") {
      if (document.querySelector("dialog[open]")) return;
      if (closeMenus()) return;
      if (this.sidebar.drawerOpen) this.sidebar.drawer(false);
      else if (this.settings.isOpen && this.settings.panel.contains(document.activeElement)) this.settings.open(false);
      else this.stop();
    } else if ((event.ctrlKey || event.metaKey) && event.key === "k") {
      event.preventDefault();
      byId("search").focus();
    } else if (event.key === "/" && !event.target.closest("input, textarea, select, [contenteditable]")) {
      event.preventDefault();
      this.composer.area.focus();
    }
  }

  // -- which conversation

  async route() {
    const [, id] = /^\/chat\/([0-9a-f-]{36})\/?$/i.exec(location.pathname) ?? [];
    if (id) await this.open(id, false);
    else this.startNew(false);
  }

  leave() {
    for (const message of this.tree.messages.values()) {
      if (message.state === "generating") this.connection.detach(message.id);
    }
    this.showError("");
    this.sidebar.drawer(false);
    this.loading += 1;
  }

  startNew(push = true) {
    this.leave();
    this.conversation = null;
    this.tree = new Tree();
    this.settings.value = {};
    if (push && location.pathname !== "/chat/") history.pushState(null, "", "/chat/");
    this.named("");
    this.sidebar.select(null);
    this.composer.open(null);
    this.showThread();
    this.composer.focus();
  }

  async open(id, push = true) {
    this.leave();
    const loading = this.loading;
    if (push && !location.pathname.includes(id)) history.pushState(null, "", `/chat/${id}/`);
    this.sidebar.select(id);
    let found;
    try {
      found = await api.conversation(id);
    } catch (error) {
      if (loading !== this.loading) return;
      if (error.status === 404) {
        this.startNew();
        this.showError("There is no such conversation. It may have been deleted.");
      } else {
        this.failed(error);
      }
      return;
    }
    if (loading !== this.loading) return;
    this.show(found);
    this.composer.open(id);
    this.composer.focus();
  }

  show(found) {
    this.conversation = found;
    this.tree = new Tree(found.messages, found.leaf);
    this.settings.value = found.settings;
    if (found.model) this.picker.choose(found.model);
    this.named(found.title);
    this.showThread();
    this.scrollToEnd(true);
  }

  named(title) {
    if (this.conversation) this.conversation.title = title;
    document.title = title ? `${title} · Roundhouse` : "Chat · Roundhouse";
  }

  /** Change something of the conversation. A new one is changed when it is made. */
  async change(values) {
    if (!this.conversation) return true;
    try {
      Object.assign(this.conversation, await api.changeConversation(this.conversation.id, values));
      return true;
    } catch (error) {
      this.failed(error);
      return false;
    }
  }

  // -- the thread

  showThread() {
    this.views.clear();
    const path = this.tree.path();
    for (const message of this.tree.messages.values()) {
      // An answer that grows in another branch comes when that branch is looked at.
      if (message.state === "generating" && !path.includes(message)) this.connection.detach(message.id);
    }
    this.thread.replaceChildren(...path.map((message) => this.view(message).root));
    for (const message of path) {
      // What was saved so far is not shown: the log is told again from its start, so each piece comes once.
      if (message.state === "generating") this.connection.attach(message.id, "0");
    }
    byId("welcome").hidden = path.length > 0;
    document.body.classList.toggle("is-empty", path.length === 0);
    this.showState();
    this.showToEnd();
  }

  view(message) {
    const view = new MessageView(message, {
      siblings: this.tree.siblings(message),
      models: (choose, current) => this.picker.items(choose, current),
      onBranch: (other) => this.choose(other),
      onRegenerate: (answer, model) => this.regenerate(answer, model),
      onEdit: (said, content) => void this.send(content, said),
      onGrow: () => this.follow(),
    });
    this.views.set(message.id, view);
    return view;
  }

  /** Put what was just taken at the end, and drop what it stands in for. */
  append(messages) {
    const following = this.atEnd;
    for (const message of messages) this.tree.add(message);
    const path = this.tree.path();
    const shown = new Set(path.map(({ id }) => id));
    for (const [id, view] of this.views) {
      if (shown.has(id)) continue;
      view.root.remove();
      this.views.delete(id);
    }
    for (const message of messages) {
      this.thread.append(this.view(message).root);
    }
    byId("welcome").hidden = true;
    document.body.classList.remove("is-empty");
    this.showState();
    if (following || messages.length > 1) this.scrollToEnd(true);
  }

  choose(sibling) {
    const end = this.tree.end(sibling);
    this.tree.leaf = end.id;
    this.showThread();
    this.thread.querySelector(`[data-id="${CSS.escape(sibling.id)}"] .branches button:not(:disabled)`)?.focus();
    void this.change({ leaf: end.id });
  }

  get generating() {
    return this.tree.path().find((message) => message.state === "generating") ?? null;
  }

  showState() {
    const message = this.generating;
    this.composer.show(this.pending ? "sending" : message ? (message.stopping ? "stopping" : "generating") : "idle");
    this.thread.setAttribute("aria-busy", String(message !== null));
  }

  // -- asking

  /** Send a text as the next message, or in place of the message `instead`. */
  async send(text, instead = null) {
    if (this.pending || this.generating) return;
    this.showError("");
    if (text.length > CONTENT_CHARACTERS || tooLarge({ content: text })) {
      this.showError(
        `The message has ${text.length.toLocaleString()} characters; at most ${CONTENT_CHARACTERS.toLocaleString()} ` +
          "(and 250 KB) can be sent. Shorten it.",
      );
      return;
    }
    if (!this.connection.open) {
      this.connection.retry();
      this.showError("There is no connection to the server. Your text is kept: send it again in a moment.");
      return;
    }
    const pending = { text, instead, type: "send" };
    this.hold(pending);
    try {
      if (!this.conversation) await this.create();
    } catch (error) {
      this.release();
      this.failed(error);
      return;
    }
    const frame = { type: "send", conversation: this.conversation.id, content: text };
    if (instead) frame.parent = instead.parent ?? null;
    if (this.picker.chosen) frame.model = this.picker.chosen;
    pending.conversation = this.conversation.id;
    if (!this.connection.write(frame)) this.lost();
  }

  async create() {
    const loading = this.loading;
    const settings = this.settings.value;
    const made = await api.createConversation(this.picker.chosen ? { model: this.picker.chosen } : {});
    if (Object.keys(settings).length) await api.changeConversation(made.id, { settings });
    if (loading !== this.loading) throw new api.ApiError(0, "Another conversation was opened; nothing was sent.");
    this.conversation = { ...made, settings };
    this.composer.adopt(made.id);
    history.pushState(null, "", `/chat/${made.id}/`);
    this.sidebar.current = made.id;
  }

  regenerate(answer, model = null) {
    if (this.pending || this.generating) return;
    this.showError("");
    const frame = { type: "regenerate", message: answer.id, model: model ?? this.picker.chosen ?? undefined };
    this.hold({ type: "regenerate", conversation: this.conversation.id });
    if (!this.connection.write(frame)) this.lost();
  }

  stop() {
    const message = this.generating;
    if (!message || message.stopping) return;
    if (this.connection.write({ type: "stop", message: message.id })) {
      message.stopping = true;
      this.showState();
      announce("Stopping");
    } else {
      this.showError("There is no connection to the server, so the answer cannot be stopped yet.");
    }
  }

  hold(pending) {
    this.pending = pending;
    this.pendingTimer = setTimeout(() => this.lost(), ANSWER_TO_SEND_MS);
    this.showState();
  }

  release() {
    clearTimeout(this.pendingTimer);
    const pending = this.pending;
    this.pending = null;
    this.showState();
    return pending;
  }

  /** It is not known whether the server took the message: look. */
  lost() {
    const pending = this.release();
    if (!pending?.conversation) return;
    const before = this.tree.messages.size;
    const ask = async () => {
      const found = await api.conversation(pending.conversation);
      if (this.conversation?.id !== pending.conversation) return;
      const taken = found.messages.length > before;
      this.show(found);
      if (taken && pending.type === "send") this.composer.set("");
      else if (!taken) this.showError("The connection broke before the message was taken. Send it again.");
    };
    ask().catch((error) => this.failed(error));
  }

  // -- what the server says

  receive(frame) {
    switch (frame.type) {
      case "sent":
        this.taken(frame);
        break;
      case "waiting":
        this.views.get(frame.message)?.wait(frame.ahead, frame.seconds);
        break;
      case "delta":
        this.views.get(frame.message)?.push(frame.text);
        break;
      case "end":
        this.ended(frame);
        break;
      case "error":
        this.refused(frame);
        break;
      default: // a newer server's; this page knows nothing to do about it
    }
  }

  taken({ user, assistant }) {
    const pending = this.release();
    void this.sidebar.load();
    if (!pending || pending.conversation !== this.conversation?.id) {
      this.connection.expect(assistant.id);
      this.connection.detach(assistant.id);
      return;
    }
    if (pending.type === "send" && !pending.instead) this.composer.set("");
    this.connection.expect(assistant.id);
    this.append(user ? [user, assistant] : [assistant]);
    announce("Generating");
  }

  ended(frame) {
    const message = this.tree.get(frame.message);
    if (!message) return;
    const { type, seq, message: id, title, ...facts } = frame;
    Object.assign(message, { error: null }, facts);
    const view = this.views.get(id);
    if (view) {
      message.content = view.answer.text;
      view.end();
    }
    if (title) {
      this.named(title);
      this.sidebar.title(this.conversation.id, title);
    }
    this.showState();
    this.follow();
    announce(
      { complete: "Answer ready", stopped: "Answer stopped" }[message.state] ?? `The answer failed. ${message.error ?? ""}`,
    );
    // The log may be gone although the answer is not: then what was saved is shown.
    if (view && !message.content && message.completion_tokens > 0) void this.open(this.conversation.id, false);
  }

  refused({ message, text }) {
    const answer = message && this.tree.get(message);
    if (answer?.state === "generating") {
      // It cannot be followed: what the server has of it is the truth.
      if (answer.stopping) {
        answer.stopping = false;
        this.showState();
      }
      this.showError(text);
      return;
    }
    this.release();
    this.showError(text);
  }

  connected(open) {
    clearTimeout(this.bannerTimer);
    if (open) {
      const was = !byId("offline").hidden;
      byId("offline").hidden = true;
      if (was) {
        announce("Connected again");
        void this.picker.poll();
        void this.sidebar.load();
      }
      return;
    }
    if (this.pending?.conversation) this.lost();
    // A page that is being left, or a server that restarts at once, is no news.
    this.bannerTimer = setTimeout(() => {
      byId("offline").hidden = false;
      announce("Connection lost");
      // A socket is refused without a reason; the API says whether one has been logged out.
      void this.picker.poll();
    }, 1_200);
  }

  // -- what the page says

  failed(error, quiet = false) {
    if (error.status === 401 || error.status === 403) {
      byId("login-again").href = `/login/?next=${encodeURIComponent(location.pathname)}`;
      byId("signed-out").hidden = false;
      byId("offline").hidden = true;
    } else if (!(quiet && error.status === 0)) {
      this.showError(error.message);
    }
  }

  showError(text) {
    byId("error-text").textContent = text;
    byId("error").hidden = !text;
  }

  // -- scrolling: along with the answer as long as its end is in view

  get atEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR_THE_END;
  }

  follow() {
    if (this.following) this.scrollToEnd();
    else this.showToEnd();
  }

  scrollToEnd(always = false) {
    if (always) this.following = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.showToEnd();
  }

  showToEnd() {
    const end = this.atEnd;
    const { scrollTop } = this.scroller;
    // Only a person scrolls up; growing text moves the end away downwards.
    if (end) this.following = true;
    else if (scrollTop < (this.lastTop ?? 0)) this.following = false;
    this.lastTop = scrollTop;
    byId("to-end").hidden = end || this.tree.messages.size === 0;
  }
}

new Chat();
