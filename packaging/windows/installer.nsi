; Windows installer, made with makensis: see packages.py, one folder up, for the defines.
;
;   VERSION  such as 5.2.0          FOLDER  the compiled program's folder
;   SHAWL    the service wrapper    OUTPUT  the installer to write
;
; Silent, for the first installation:
;   installer.exe /S /BASE_URL=... /CLIENT_ID=... /AGENT_ID=... /CLIENT_SECRET=...
;   installer.exe /S /CONFIG=C:\path\agent.properties     keeps the secret out of the list of processes
; Silent, over an installed one: installer.exe /S           its settings are kept
; Uninstall: uninstall.exe [/S] [/PURGE]                    /PURGE deletes settings, waiting messages and logs as well
;
; Exit codes: 0 done, 1 cancelled, 2 values are missing or the service could not be made.

Unicode true
Target amd64-unicode
SetCompressor /SOLID lzma
RequestExecutionLevel admin
ShowInstDetails nevershow ; nothing that a person types may be seen there
ManifestSupportedOS all

!include MUI2.nsh
!include FileFunc.nsh
!include LogicLib.nsh
!include nsDialogs.nsh

!define SERVICE "MedplumAgent"
!define UNINSTALL_KEY "Software\Microsoft\Windows\CurrentVersion\Uninstall\MedplumAgent"
!define EVENT_KEY "SYSTEM\CurrentControlSet\Services\EventLog\Application\Medplum Agent"
!define SYSTEM_ACCOUNTS '/grant:r "*S-1-5-18:(OI)(CI)F" "*S-1-5-32-544:(OI)(CI)F"' ; SYSTEM and Administrators
!define LOCAL_SERVICE "*S-1-5-19"

Name "Medplum Agent"
OutFile "${OUTPUT}"
InstallDir "$PROGRAMFILES64\Medplum Agent"
VIProductVersion "${VERSION}.0"
VIAddVersionKey ProductName "Medplum Agent"
VIAddVersionKey FileDescription "Medplum Agent installer"
VIAddVersionKey FileVersion "${VERSION}"
VIAddVersionKey ProductVersion "${VERSION}"
VIAddVersionKey LegalCopyright "Apache-2.0"

Var BaseUrl
Var ClientId
Var ClientSecret
Var AgentId
Var ConfigFile
Var StateDir
Var Field1
Var Field2
Var Field3
Var Field4
Var Purge

!define MUI_FINISHPAGE_TITLE "Medplum Agent is installed"
!define MUI_FINISHPAGE_TEXT "The service Medplum Agent runs and starts with Windows.$\r$\n$\r$\nIts logs are in $StateDir."
Page custom AskValues TakeValues
!insertmacro MUI_PAGE_INSTFILES
!insertmacro MUI_PAGE_FINISH
!insertmacro MUI_UNPAGE_CONFIRM
!insertmacro MUI_UNPAGE_INSTFILES
!insertmacro MUI_LANGUAGE English

; --- what both the installer and the uninstaller do ---

!macro COMMON prefix
; Stop and delete every service of ours and of the reference agent (MedplumAgent, MedplumAgent_<version>).
Function ${prefix}RemoveServices
    StrCpy $0 0
    ${Do}
        EnumRegKey $1 HKLM "SYSTEM\CurrentControlSet\Services" $0
        ${If} $1 == ""
            ${Break}
        ${EndIf}
        IntOp $0 $0 + 1
        StrCpy $2 $1 12
        ${If} $2 == "${SERVICE}"
            nsExec::Exec 'net stop "$1"' ; waits until it has stopped
            Pop $2
            nsExec::Exec 'sc delete "$1"'
            Pop $2
            ${If} $2 == 0
                IntOp $0 $0 - 1 ; the next one takes its place
            ${EndIf}
        ${EndIf}
    ${Loop}
    Sleep 1000 ; until Windows lets go of the files
FunctionEnd

Function ${prefix}FindPlaces
    SetRegView 64
    SetShellVarContext all
    StrCpy $StateDir "$APPDATA\MedplumAgent"
FunctionEnd
!macroend
!insertmacro COMMON ""
!insertmacro COMMON "un."

; --- the four values ---

; NSIS's own GetOptions ends a value at the next slash: URLs and secrets have them.
!macro GetValue option result
    Push "${option}"
    Call GetValue
    Pop ${result}
!macroend

; Option on the stack -> its value: up to the next space, or up to the next quote where one stands before or after "=".
Function GetValue
    Exch $0
    StrLen $1 $0
    StrCpy $2 0
    ${Do}
        StrCpy $3 $R0 $1 $2
        ${If} $3 == ""
            StrCpy $0 ""
            Exch $0
            Return
        ${EndIf}
        ${If} $3 == $0
            ${Break}
        ${EndIf}
        IntOp $2 $2 + 1
    ${Loop}
    StrCpy $4 " "
    ${If} $2 > 0
        IntOp $5 $2 - 1
        StrCpy $3 $R0 1 $5
        ${If} $3 == '"'
            StrCpy $4 '"'
        ${EndIf}
    ${EndIf}
    IntOp $2 $2 + $1
    StrCpy $3 $R0 1 $2
    ${If} $3 == '"'
        StrCpy $4 '"'
        IntOp $2 $2 + 1
    ${EndIf}
    StrCpy $0 ""
    ${Do}
        StrCpy $3 $R0 1 $2
        ${If} $3 == ""
        ${OrIf} $3 == $4
            ${Break}
        ${EndIf}
        StrCpy $0 "$0$3"
        IntOp $2 $2 + 1
    ${Loop}
    Exch $0
FunctionEnd

Function .onInit
    Call FindPlaces
    ReadRegStr $0 HKLM "${UNINSTALL_KEY}" "InstallLocation"
    ${If} $0 != ""
        StrCpy $INSTDIR $0
    ${EndIf}
    ${GetParameters} $R0
    !insertmacro GetValue "/BASE_URL=" $BaseUrl
    !insertmacro GetValue "/CLIENT_ID=" $ClientId
    !insertmacro GetValue "/CLIENT_SECRET=" $ClientSecret
    !insertmacro GetValue "/AGENT_ID=" $AgentId
    !insertmacro GetValue "/CONFIG=" $ConfigFile
    ${If} $BaseUrl == ""
        StrCpy $BaseUrl "https://api.medplum.com/"
    ${EndIf}
    ${If} ${Silent}
    ${AndIfNot} ${FileExists} "$INSTDIR\agent.properties"
    ${AndIfNot} ${FileExists} "$INSTDIR\agent.toml"
        Call CheckSilentValues
    ${EndIf}
FunctionEnd

Function CheckSilentValues
    ${If} $ConfigFile != ""
        ${IfNot} ${FileExists} $ConfigFile
            SetErrorLevel 2
            Quit
        ${EndIf}
    ${ElseIf} $ClientId == ""
    ${OrIf} $ClientSecret == ""
    ${OrIf} $AgentId == ""
        SetErrorLevel 2
        Quit
    ${EndIf}
FunctionEnd

Function AskValues
    ${If} ${FileExists} "$INSTDIR\agent.properties"
    ${OrIf} ${FileExists} "$INSTDIR\agent.toml"
    ${OrIf} $ConfigFile != ""
        Abort ; nothing to ask
    ${EndIf}
    !insertmacro MUI_HEADER_TEXT "Connect to the Medplum server" "Values of the ClientApplication and the Agent resource"
    nsDialogs::Create 1018
    Pop $0
    ${NSD_CreateLabel} 0 0 100% 10u "Base URL of the server"
    Pop $0
    ${NSD_CreateText} 0 11u 100% 13u "$BaseUrl"
    Pop $Field1
    ${NSD_CreateLabel} 0 29u 100% 10u "Client ID"
    Pop $0
    ${NSD_CreateText} 0 40u 100% 13u "$ClientId"
    Pop $Field2
    ${NSD_CreateLabel} 0 58u 100% 10u "Client secret"
    Pop $0
    ${NSD_CreatePassword} 0 69u 100% 13u "$ClientSecret"
    Pop $Field3
    ${NSD_CreateLabel} 0 87u 100% 10u "Agent ID"
    Pop $0
    ${NSD_CreateText} 0 98u 100% 13u "$AgentId"
    Pop $Field4
    nsDialogs::Show
FunctionEnd

Function TakeValues
    ${NSD_GetText} $Field1 $BaseUrl
    ${NSD_GetText} $Field2 $ClientId
    ${NSD_GetText} $Field3 $ClientSecret
    ${NSD_GetText} $Field4 $AgentId
    ${If} $BaseUrl == ""
    ${OrIf} $ClientId == ""
    ${OrIf} $ClientSecret == ""
    ${OrIf} $AgentId == ""
        MessageBox MB_OK|MB_ICONEXCLAMATION "All four values are needed."
        Abort
    ${EndIf}
FunctionEnd

; --- install ---

Section "Install"
    SetDetailsPrint none
    Call RemoveServices
    SetOutPath "$INSTDIR"
    RMDir /r "$INSTDIR\program"
    Delete "$INSTDIR\shawl*.exe"
    Delete "$INSTDIR\medplum-agent-*.exe" ; of the reference agent
    File "/oname=shawl.exe" "${SHAWL}"
    File "/oname=README.md" "${README}"
    SetOutPath "$INSTDIR\program"
    File /r "${FOLDER}\*.*"
    SetOutPath "$INSTDIR"
    Call WriteSettings
    CreateDirectory "$StateDir"
    nsExec::Exec 'icacls "$StateDir" /inheritance:r ${SYSTEM_ACCOUNTS} /grant:r "${LOCAL_SERVICE}:(OI)(CI)M"'
    Pop $0
    Call MakeService
    Call Register
    nsExec::Exec 'sc start ${SERVICE}'
    Pop $0
SectionEnd

; The file is closed to other users before the secret is in it.
Function WriteSettings
    ${If} $ConfigFile != ""
        FileOpen $0 "$INSTDIR\agent.properties" w
        FileClose $0
        Call CloseSettings
        CopyFiles /SILENT "$ConfigFile" "$INSTDIR\agent.properties"
    ${ElseIfNot} ${FileExists} "$INSTDIR\agent.properties"
    ${AndIfNot} ${FileExists} "$INSTDIR\agent.toml"
        FileOpen $0 "$INSTDIR\agent.properties" w
        FileClose $0
        Call CloseSettings
        FileOpen $0 "$INSTDIR\agent.properties" a
        FileWrite $0 "baseUrl=$BaseUrl$\r$\n"
        FileWrite $0 "clientId=$ClientId$\r$\n"
        FileWrite $0 "clientSecret=$ClientSecret$\r$\n"
        FileWrite $0 "agentId=$AgentId$\r$\n"
        FileClose $0
    ${EndIf}
    Call CloseSettings
FunctionEnd

Function CloseSettings
    ${If} ${FileExists} "$INSTDIR\agent.properties"
        nsExec::Exec 'icacls "$INSTDIR\agent.properties" /inheritance:r /grant:r "*S-1-5-18:F" "*S-1-5-32-544:F" "${LOCAL_SERVICE}:R"'
        Pop $1
    ${EndIf}
FunctionEnd

; Windows starts it again with a growing delay, also when it ends by itself with an error (failureflag).
Function MakeService
    StrCpy $1 0
    ${Do} ; the deleted service lives until the last window that shows it is closed
        nsExec::Exec '"$INSTDIR\shawl.exe" add --name ${SERVICE} --cwd "$INSTDIR" --log-dir "$StateDir" --no-log-cmd --no-restart --stop-timeout 20000 -- "$INSTDIR\program\medplum-agent.exe"'
        Pop $0
        IntOp $1 $1 + 1
        ${If} $0 == 0
        ${OrIf} $1 == 20
            ${Break}
        ${EndIf}
        Sleep 1000
    ${Loop}
    ${If} $0 != 0
        SetErrorLevel 2
        MessageBox MB_OK|MB_ICONSTOP "The service could not be made (shawl ended with $0)." /SD IDOK
        Abort
    ${EndIf}
    nsExec::Exec 'sc config ${SERVICE} start= auto obj= "NT AUTHORITY\LocalService" password= "" DisplayName= "Medplum Agent"'
    Pop $0
    nsExec::Exec 'sc description ${SERVICE} "Carries messages between hospital devices and a Medplum server."'
    Pop $0
    nsExec::Exec 'sc failure ${SERVICE} reset= 3600 actions= restart/5000/restart/15000/restart/60000'
    Pop $0
    nsExec::Exec 'sc failureflag ${SERVICE} 1'
    Pop $0
    nsExec::Exec 'netsh advfirewall firewall delete rule name="Medplum Agent"'
    Pop $0
    nsExec::Exec 'netsh advfirewall firewall add rule name="Medplum Agent" dir=in action=allow program="$INSTDIR\program\medplum-agent.exe" enable=yes'
    Pop $0
FunctionEnd

Function Register
    WriteUninstaller "$INSTDIR\uninstall.exe"
    WriteRegStr HKLM "${UNINSTALL_KEY}" "DisplayName" "Medplum Agent"
    WriteRegStr HKLM "${UNINSTALL_KEY}" "DisplayVersion" "${VERSION}"
    WriteRegStr HKLM "${UNINSTALL_KEY}" "Publisher" "Medplum Agent"
    WriteRegStr HKLM "${UNINSTALL_KEY}" "InstallLocation" "$INSTDIR"
    WriteRegStr HKLM "${UNINSTALL_KEY}" "UninstallString" '"$INSTDIR\uninstall.exe"'
    WriteRegStr HKLM "${UNINSTALL_KEY}" "QuietUninstallString" '"$INSTDIR\uninstall.exe" /S'
    WriteRegDWORD HKLM "${UNINSTALL_KEY}" "NoModify" 1
    WriteRegDWORD HKLM "${UNINSTALL_KEY}" "NoRepair" 1
    ${GetSize} "$INSTDIR" "/S=0K" $0 $1 $2
    WriteRegDWORD HKLM "${UNINSTALL_KEY}" "EstimatedSize" $0
    ; Errors of the agent are event 1 of this source; EventCreate, a part of Windows, shows such events as their text
    WriteRegExpandStr HKLM "${EVENT_KEY}" "EventMessageFile" "%SystemRoot%\System32\EventCreate.exe"
    WriteRegDWORD HKLM "${EVENT_KEY}" "TypesSupported" 7
    CreateDirectory "$SMPROGRAMS\Medplum Agent"
    CreateShortcut "$SMPROGRAMS\Medplum Agent\Uninstall.lnk" "$INSTDIR\uninstall.exe"
FunctionEnd

; --- uninstall ---

Function un.onInit
    Call un.FindPlaces
    ${GetParameters} $R0
    ClearErrors
    ${GetOptions} $R0 "/PURGE" $Purge
    ${If} ${Errors}
        StrCpy $Purge no
        MessageBox MB_YESNO|MB_ICONQUESTION|MB_DEFBUTTON2 "Delete the messages that wait in $StateDir and the logs, too?" /SD IDNO IDNO kept
        StrCpy $Purge yes
    ${Else}
        StrCpy $Purge yes
    ${EndIf}
    kept:
FunctionEnd

Section "Uninstall"
    SetDetailsPrint none
    Call un.RemoveServices
    nsExec::Exec 'netsh advfirewall firewall delete rule name="Medplum Agent"'
    Pop $0
    RMDir /r "$INSTDIR\program"
    Delete "$INSTDIR\shawl.exe"
    Delete "$INSTDIR\README.md"
    Delete "$INSTDIR\uninstall.exe"
    Delete "$SMPROGRAMS\Medplum Agent\Uninstall.lnk"
    RMDir "$SMPROGRAMS\Medplum Agent"
    DeleteRegKey HKLM "${UNINSTALL_KEY}"
    DeleteRegKey HKLM "${EVENT_KEY}"
    ${If} $Purge == yes
        Delete "$INSTDIR\agent.properties"
        Delete "$INSTDIR\agent.toml"
        RMDir /r "$StateDir"
    ${EndIf}
    RMDir "$INSTDIR"
SectionEnd
