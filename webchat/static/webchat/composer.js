/** Where one writes. The draft of each conversation is kept until it was sent. */

import { byId } from "./dom.js";

// Drafts live as long as the tab: on a shared machine the next person does not find them.
const drafts = sessionStorage;
const TALLEST = 0.4;

export class Composer {
  /** @param {{onSend: (text: string) => void, onStop: () => void}} handlers */
  constructor({ onSend, onStop }) {
    this.area = byId("composer-text");
    this.sendButton = byId("send");
    this.stopButton = byId("stop");
    this.key = null; // until a conversation is opened nobody knows whose draft it is
    this.busy = false;
    const touch = matchMedia("(pointer: coarse)");
    const hint = () => {
      this.area.enterKeyHint = touch.matches ? "enter" : "send";
      byId("composer-hint").hidden = touch.matches;
    };
    touch.addEventListener("change", hint);
    hint();

    this.area.addEventListener("input", () => {
      this.keep();
      this.fit();
    });
    this.area.addEventListener("keydown", (event) => {
      // A composing input method uses Enter for itself.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || touch.matches) return;
      event.preventDefault();
      submit();
    });
    const submit = () => {
      const text = this.area.value.trim();
      if (text && !this.busy) onSend(text);
    };
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      submit();
    });
    this.stopButton.addEventListener("click", onStop);
  }

  /** Show the draft of a conversation, null for a new one. What was typed before the first of them was
   * there stays: a page is seen before its scripts have run. */
  open(id) {
    const early = this.key === null ? this.area.value : "";
    this.key = `draft:${id ?? "new"}`;
    this.set(early || (drafts.getItem(this.key) ?? ""));
  }

  /** A new conversation was given its id: its draft goes along. */
  adopt(id) {
    drafts.removeItem(this.key);
    this.key = `draft:${id}`;
    this.keep();
  }

  set(text) {
    this.area.value = text;
    this.keep();
    this.fit();
  }

  keep() {
    if (this.key !== null) {
      if (this.area.value) drafts.setItem(this.key, this.area.value);
      else drafts.removeItem(this.key);
    }
    this.sendButton.disabled = this.busy || !this.area.value.trim();
  }

  focus() {
    if (!matchMedia("(pointer: coarse)").matches) this.area.focus();
  }

  fit() {
    this.area.style.height = "auto";
    this.area.style.height = `${Math.min(this.area.scrollHeight, innerHeight * TALLEST)}px`;
  }

  /** @param {"idle"|"sending"|"generating"|"stopping"} state */
  show(state) {
    this.busy = state !== "idle";
    this.stopButton.hidden = state !== "generating" && state !== "stopping";
    this.stopButton.disabled = state === "stopping";
    this.sendButton.hidden = !this.stopButton.hidden;
    this.sendButton.disabled = this.busy || !this.area.value.trim();
  }
}

export function forgetDrafts() {
  for (const key of Object.keys(drafts)) if (key.startsWith("draft:")) drafts.removeItem(key);
}
