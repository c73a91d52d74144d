/** The JSON half of the server: conversations and models. */

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function csrfToken() {
  return document.querySelector("input[name=csrfmiddlewaretoken]").value;
}

async function call(method, path, body) {
  let response;
  try {
    response = await fetch(`/chat/api/${path}`, {
      method,
      credentials: "same-origin",
      redirect: "error",
      headers: body === undefined
        ? { "X-CSRFToken": csrfToken() }
        : { "X-CSRFToken": csrfToken(), "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new ApiError(0, "The server cannot be reached. Check the connection and try again.");
  }
  if (response.status === 204) return null;
  const answer = await response.json().catch(() => null);
  if (response.ok) return answer;
  throw new ApiError(
    response.status,
    answer?.error?.message ?? `The server answered with status ${response.status}. Try again.`,
  );
}

const one = (id) => `conversations/${encodeURIComponent(id)}`;

export const models = async () => (await call("GET", "models")).models;
export const conversations = async (query) =>
  (await call("GET", `conversations?q=${encodeURIComponent(query)}`)).conversations;
export const createConversation = (values) => call("POST", "conversations", values);
export const conversation = (id) => call("GET", one(id));
export const changeConversation = (id, values) => call("PATCH", one(id), values);
export const deleteConversation = (id) => call("DELETE", one(id));
