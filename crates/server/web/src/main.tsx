import { render } from "preact";
import { App } from "./app";
import "./style/base.css";
import "./style/layout.css";
import "./style/picture.css";
import "./style/form.css";
import "./style/history.css";

render(<App />, document.body);
