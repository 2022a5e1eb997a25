"use strict";

MFN.pages.model = () => MFN.html`<${MFN.Heading} title="Model" />`;
