/** One message in the page, with what can be done to it. */

import { AnswerView, showAnswer } from "./answer.js";
import { copyButton, element, icon, iconButton } from "./dom.js";
import { attachMenu } from "./menu.js";

const GENERATING = "Generating…";

export class MessageView {
  /**
   * @param {object} message
   * @param {{siblings: object[], models: Function, onBranch: Function, onRegenerate: Function,
   *   onEdit: Function, onGrow: Function}} page
   */
  constructor(message, page) {
    this.message = message;
    this.page = page;
    this.body = element("div", { class: "body" });
    this.foot = element("div", { class: "foot" });
    this.root = element(
      "article",
      {
        class: `message ${message.role}`,
        "aria-label": message.role === "user" ? "You" : `Answer of ${message.model || "the model"}`,
        "data-id": message.id,
      },
      this.body,
      this.foot,
    );
    if (message.role === "user") {
      this.body.textContent = message.content;
    } else if (message.state === "generating") {
      this.answer = new AnswerView(this.body, page.onGrow);
    } else {
      this.answer = showAnswer(this.body, message.content);
    }
    this.showFoot();
  }

  /** All workers are busy: `ahead` answers come first, and this one in about `seconds`, if that is known. */
  wait(ahead, seconds) {
    const word = this.foot.querySelector(".word");
    if (!word) return;
    const place = ahead ? `Waiting: ${ahead} ahead` : "Waiting: next in line";
    word.textContent = seconds === null ? place : `${place}, about ${Math.max(1, Math.round(seconds))} s`;
  }

  push(text) {
    const word = this.foot.querySelector(".word");
    if (word && !this.root.classList.contains("started")) word.textContent = GENERATING;
    this.root.classList.add("started");
    this.answer.push(text);
  }

  /** The answer has ended: `message` holds its state and figures. */
  end() {
    this.answer.finish();
    this.showFoot();
  }

  showFoot() {
    const { message } = this;
    this.root.dataset.state = message.state;
    if (message.state === "generating") {
      this.foot.replaceChildren(
        element("span", { class: "working" }, element("span", { class: "pulse", "aria-hidden": "true" }), element("span", { class: "word" }, GENERATING)),
      );
      return;
    }
    this.foot.replaceChildren(
      ...this.trouble(),
      element("div", { class: "actions" }, ...this.branches(), ...this.actions(), ...this.figures()),
    );
  }

  actions() {
    const copy = copyButton("Copy message", () => this.answer?.text ?? this.message.content);
    if (this.message.role === "user") {
      return [copy, iconButton("edit", "Edit and ask again", () => this.edit())];
    }
    const again = iconButton("again", "Regenerate", () => this.page.onRegenerate(this.message));
    const other = iconButton("chevron", "Regenerate with another model", () => {}, { class: "icon-button narrow" });
    const group = element("span", { class: "menu-anchor" }, again, other);
    attachMenu(other, () => this.page.models((model) => this.page.onRegenerate(this.message, model), this.message.model), {
      empty: "There is no model.",
    });
    return [copy, group];
  }

  branches() {
    const all = this.page.siblings;
    const at = all.indexOf(this.message);
    if (all.length < 2) return [];
    const go = (name, label, to) =>
      iconButton(name, label, () => this.page.onBranch(all[to]), { disabled: to < 0 || to >= all.length });
    return [
      element(
        "span",
        { class: "branches", role: "group", "aria-label": "Versions" },
        go("left", "Previous version", at - 1),
        element("span", { class: "branch-count" }, `${at + 1}/${all.length}`),
        go("right", "Next version", at + 1),
      ),
    ];
  }

  figures() {
    const { message } = this;
    if (message.role !== "assistant") return [];
    const parts = [message.model || null];
    if (message.completion_tokens) parts.push(`${message.prompt_tokens ?? 0} → ${message.completion_tokens} tokens`);
    if (message.ttft_ms !== null && message.ttft_ms !== undefined) parts.push(`first after ${seconds(message.ttft_ms)}`);
    const pace = tokensPerSecond(message);
    if (pace) parts.push(`${pace} tok/s`);
    return [
      element(
        "span",
        {
          class: "figures",
          title: "Model; tokens of the prompt → of the answer; time to the first token; tokens per second after it",
        },
        parts.filter(Boolean).join(" · "),
      ),
    ];
  }

  trouble() {
    const { state, error } = this.message;
    const said = typeof error === "string" ? error : error?.message;
    const text = {
      failed: said || "The answer failed. Try again.",
      interrupted: said || "The answer was cut off because the server stopped. Try again.",
      stopped: "You stopped this answer.",
    }[state];
    if (!text) return [];
    if (state === "stopped") return [element("p", { class: "note" }, text)];
    return [
      element(
        "div",
        { class: "trouble" },
        icon("warning"),
        element("p", {}, text),
        element(
          "button",
          { type: "button", class: "button", on: { click: () => this.page.onRegenerate(this.message) } },
          "Try again",
        ),
      ),
    ];
  }

  edit() {
    const area = element("textarea", { class: "edit-area", "aria-label": "Edit your message", rows: "3" });
    area.value = this.message.content;
    const cancel = () => {
      this.body.textContent = this.message.content;
      this.root.classList.remove("editing");
      this.showFoot();
    };
    const send = () => {
      const content = area.value.trim();
      if (content) this.page.onEdit(this.message, content);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        send();
      }
    });
    this.root.classList.add("editing");
    this.body.replaceChildren(area);
    this.foot.replaceChildren(
      element(
        "div",
        { class: "actions" },
        element("button", { type: "button", class: "button primary", on: { click: send } }, "Ask again"),
        element("button", { type: "button", class: "button", on: { click: cancel } }, "Cancel"),
      ),
    );
    area.focus();
  }
}

function seconds(milliseconds) {
  return `${(milliseconds / 1000).toFixed(milliseconds < 10_000 ? 2 : 0)} s`;
}

/** After the first token, which waits for the prompt. */
function tokensPerSecond({ completion_tokens: tokens, ttft_ms: first, duration_ms: whole }) {
  if (!(tokens > 1) || !(whole > (first ?? 0))) return null;
  const pace = (tokens - 1) / ((whole - (first ?? 0)) / 1000);
  return pace >= 100 ? Math.round(pace) : pace.toFixed(1);
}
