/** The messages of a conversation: a tree, of which the page shows one path. */

export class Tree {
  constructor(messages = [], leaf = null) {
    this.messages = new Map(messages.map((message) => [message.id, message]));
    this.leaf = leaf ?? messages.at(-1)?.id ?? null;
  }

  get(id) {
    return this.messages.get(id);
  }

  add(message) {
    this.messages.set(message.id, message);
    this.leaf = message.id;
  }

  /** From the first message to the leaf. */
  path() {
    const path = [];
    for (let at = this.get(this.leaf); at; at = this.get(at.parent)) path.unshift(at);
    return path;
  }

  /** The messages that stand in the same place, itself included, oldest first. */
  siblings(message) {
    return [...this.messages.values()].filter((other) => (other.parent ?? null) === (message.parent ?? null));
  }

  /** The newest end of the branch that goes through a message. */
  end(message) {
    for (let at = message; ; ) {
      const next = [...this.messages.values()].filter((other) => other.parent === at.id).at(-1);
      if (!next) return at;
      at = next;
    }
  }
}
