/** The list of conversations: search, open, rename, delete. */

import * as api from "./api.js";
import { announce, byId, element, icon } from "./dom.js";
import { attachMenu } from "./menu.js";

const DAY = 86_400_000;

export class Sidebar {
  /** @param {{onOpen: Function, onDeleted: Function, onRenamed: Function, onError: Function}} handlers */
  constructor(handlers) {
    this.handlers = handlers;
    this.list = byId("conversations");
    this.search = byId("search");
    this.items = [];
    this.current = null;
    this.search.addEventListener("input", () => {
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.load(), 200);
    });
    this.search.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.search.value) {
        event.stopPropagation();
        this.search.value = "";
        void this.load();
      }
    });
    byId("open-drawer").addEventListener("click", () => this.drawer(true));
    byId("close-drawer").addEventListener("click", () => this.drawer(false));
    byId("scrim").addEventListener("click", () => this.drawer(false));
  }

  get drawerOpen() {
    return document.body.classList.contains("drawer-open");
  }

  drawer(open) {
    const was = this.drawerOpen;
    document.body.classList.toggle("drawer-open", open);
    byId("open-drawer").setAttribute("aria-expanded", String(open));
    byId("main").inert = open;
    if (open) byId("close-drawer").focus();
    else if (was) byId("open-drawer").focus();
  }

  async load() {
    const query = this.search.value.trim();
    try {
      const found = await api.conversations(query);
      if (query !== this.search.value.trim()) return;
      this.items = found;
      this.show();
    } catch (error) {
      this.handlers.onError(error);
    }
  }

  select(id) {
    this.current = id;
    for (const link of this.list.querySelectorAll("a")) {
      if (link.dataset.id === id) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }

  title(id, title) {
    const item = this.items.find((one) => one.id === id);
    if (!item || item.title === title) return;
    item.title = title;
    this.show();
  }

  /** Show the items, but not under the hands of somebody who has a menu open or writes a title. */
  show(always = false) {
    clearTimeout(this.later);
    if (!always && this.list.querySelector(".rename, [aria-expanded=true]")) {
      this.later = setTimeout(() => this.show(), 500);
      return;
    }
    this.list.replaceChildren();
    let group = null;
    for (const item of this.items) {
      const name = period(new Date(item.updated_at));
      if (name !== group) {
        this.list.append(element("li", { class: "period" }, name));
        group = name;
      }
      this.list.append(this.row(item));
    }
    if (!this.items.length) {
      this.list.append(
        element("li", { class: "list-empty" }, this.search.value.trim() ? "Nothing found." : "No conversations yet."),
      );
    }
    this.select(this.current);
  }

  row(item) {
    const title = item.title || "New conversation";
    const link = element(
      "a",
      {
        href: `/chat/${item.id}/`,
        "data-id": item.id,
        title,
        on: {
          click: (event) => {
            if (event.ctrlKey || event.metaKey || event.shiftKey) return;
            event.preventDefault();
            this.handlers.onOpen(item.id);
          },
        },
      },
      title,
    );
    const more = element(
      "button",
      { type: "button", class: "icon-button row-more", "aria-label": `Actions for ${title}`, title: "Actions" },
      icon("more"),
    );
    const row = element("li", { class: "row" }, link, more);
    attachMenu(more, () => [
      { label: "Rename", choose: () => this.rename(item, row) },
      { label: "Delete", danger: true, choose: () => this.remove(item) },
    ]);
    return row;
  }

  rename(item, row) {
    const input = element("input", { class: "rename", "aria-label": "New title", maxlength: "200" });
    input.value = item.title;
    let done = false;
    const finish = async (keep) => {
      if (done) return;
      done = true;
      const title = input.value.trim();
      if (keep && title && title !== item.title) {
        try {
          item.title = (await api.changeConversation(item.id, { title })).title ?? title;
          this.handlers.onRenamed(item);
          announce("Renamed");
        } catch (error) {
          this.handlers.onError(error);
        }
      }
      this.show(true);
      this.list.querySelector(`a[data-id="${CSS.escape(item.id)}"]`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      void finish(event.key === "Enter");
    });
    input.addEventListener("blur", () => void finish(true));
    row.replaceChildren(input);
    input.focus();
    input.select();
  }

  async remove(item) {
    const dialog = byId("delete-dialog");
    byId("delete-title").textContent = item.title || "New conversation";
    dialog.returnValue = "";
    dialog.showModal();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
    if (dialog.returnValue !== "delete") return;
    try {
      await api.deleteConversation(item.id);
      this.items = this.items.filter((one) => one !== item);
      this.show();
      announce("Deleted");
      this.handlers.onDeleted(item.id);
    } catch (error) {
      this.handlers.onError(error);
    }
  }
}

function period(date) {
  const midnight = new Date();
  midnight.setHours(0, 0, 0, 0);
  if (date >= midnight) return "Today";
  if (date >= midnight - DAY) return "Yesterday";
  if (date >= midnight - 7 * DAY) return "Last 7 days";
  return "Earlier";
}
